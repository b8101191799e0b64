"""How the project is packed and shipped: the image, and checks of generated files."""
