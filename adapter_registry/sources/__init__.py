"""A push by URI: the registry fetches the files itself, from what an operator allows and nowhere else."""
