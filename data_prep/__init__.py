"""From images to a prepared dataset: read, verify, group duplicates, split, filter, oversample."""
