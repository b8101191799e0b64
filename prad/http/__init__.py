"""What services that speak HTTP have in common, whatever they serve, and what asks them."""
