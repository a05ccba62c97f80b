"""Other libraries' interfaces on this one's operators, a module each."""
