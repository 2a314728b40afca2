"""WebDataset shards: tar files of samples, read by index where they are local, as a stream where they are not."""
