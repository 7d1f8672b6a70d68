"""What a run is: frozen pydantic models. Imports neither torch nor ray."""
