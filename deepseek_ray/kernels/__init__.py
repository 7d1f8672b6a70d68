"""Fast operators beside their slow references."""
