"""Other people's checkpoints: readers that turn them into a StateIndex over their files, and writers."""
