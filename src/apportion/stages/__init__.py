"""The stages of the pipeline, one readable loop each."""
