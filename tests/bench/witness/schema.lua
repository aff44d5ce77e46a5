return { name = "witness", fields = { { config = { type = "record", fields = {} } } } }
