"""Building, stamping and bundling of the wheels: what noxfile.py and the build hook call."""
