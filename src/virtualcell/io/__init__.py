"""Reading and writing models."""

__all__: list[str] = []
