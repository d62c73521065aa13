"""wamrl."""
