"""trtbuild."""
