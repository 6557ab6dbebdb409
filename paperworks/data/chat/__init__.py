"""Chat templates, rendered in a sandbox."""

from paperworks.data.chat.template import ChatTemplateError, render

__all__ = ["ChatTemplateError", "render"]
