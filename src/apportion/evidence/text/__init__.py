"""Evidence made from the text of a response: sentences and phrases."""
