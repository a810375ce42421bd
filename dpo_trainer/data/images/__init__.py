"""Images: paths, bytes or addresses come in; pixels, and their places in a row of token ids, go out."""
