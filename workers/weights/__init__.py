"""Where weights come from: files, formats, and the loader that proves every parameter was filled."""
