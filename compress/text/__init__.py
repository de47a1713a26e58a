"""Documents, and the windows that are cut from them."""
