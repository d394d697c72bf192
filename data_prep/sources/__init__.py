"""Where images come from. Each source gives rows of path, class name, split (or none yet) and attribution."""
