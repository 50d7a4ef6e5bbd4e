"""The compositor's output, under the name that users of blendtorch know."""

from .compositor import CompositeRenderer, CompositeSelection

__all__ = ["CompositeRenderer", "CompositeSelection"]
