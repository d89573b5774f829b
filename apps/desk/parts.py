"""Gradio's picture and sound, without its handling of files.

Gradio would open what a path names, copy it, and decode it here. The page's files are known by
tokens of `uploads`, which go through as they are.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import gradio as gr

from kvshare_mm.apps.desk.door import FILE


def shown(path: str, token: str, name: str, kind: str) -> dict[str, Any]:
    """What the page is sent of an upload, to show it.

    Without Gradio's mark of a file: it has no path that Gradio should look for.

    Args:
        path: where the desk is mounted.
        token: of the upload.
        name: of the file.
        kind: its content type.
    """
    return {
        "path": token,
        "url": f"{path}{FILE}{token}",
        "orig_name": name,
        "mime_type": kind,
        "is_stream": False,
    }


def _by_token(component: Any) -> Any:
    """A component whose value is the token of an upload."""

    def same(_: Any, value: Any) -> Any:
        return value

    members = {
        "__doc__": component.__doc__,
        "__module__": __name__,
        "data_model": None,
        "preprocess": same,
        "postprocess": same,
        "api_info": lambda _: {"type": "string"},
    }
    # Gradio's metaclass writes a file of types beside the module of every new component. The name
    # stays: it tells the browser how to show it.
    return ABCMeta.__new__(type(component), component.__name__, (component,), members)


Photo = _by_token(gr.Image)
Voice = _by_token(gr.Audio)
