"""Where weights come from: files, formats, and the loader that proves every one was used."""
