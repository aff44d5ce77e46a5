"""The spool: events on local disk between Kong's answer and the metering API's."""
