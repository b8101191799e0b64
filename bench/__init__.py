"""Every figure in the documents comes from a script here, which also writes hardware, versions, commit."""
