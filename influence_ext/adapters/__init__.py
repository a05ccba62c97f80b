"""Drop-in replacements for other libraries, under their names and conventions."""
