"""Tasks: what a request starts from. A file for each; which one a request means follows from what it brings."""

from sdrt.tasks.base import Start, TaskName
from sdrt.tasks.image_to_image import DEFAULT_STRENGTH, ImageToImage
from sdrt.tasks.text_to_image import TextToImage

__all__ = ["DEFAULT_STRENGTH", "ImageToImage", "Start", "TaskName", "TextToImage"]
