"""The steps of the pipeline, one file each: every step is right when it is run again, or run late."""
