"""Files: names of files, folders or datasets of the hub come in, datasets of rows go out."""
