"""A package of its own, else one of that name which a machine's packages bring would be taken for it."""
