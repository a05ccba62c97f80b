"""The adapters against the libraries whose interface they have, a module each."""
