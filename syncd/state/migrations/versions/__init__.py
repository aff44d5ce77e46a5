"""One module for each revision of the schema; one that was released is never edited."""
