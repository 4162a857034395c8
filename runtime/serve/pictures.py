"""Pictures of a request: a data URL or an allowed host -> bytes -> patches. Never a path on this machine."""

from __future__ import annotations

import base64
import binascii
import re

from phisight.errors import ImageError, InputError
from phisight.images import open_image
from phisight.model import Model
from phisight.naflex import Patches
from phisight.serve.errors import api_error
from phisight.serve.messages import PictureRef
from phisight.serve.remote import RemotePictures
from phisight.serve.settings import Access, Limits

__all__ = ["Pictures"]

_DATA_URL = re.compile(r"data:[^,;\s]{0,100}(?:;[^,;\s]{1,100}){0,8}?;base64,", re.IGNORECASE)


class Pictures:
    """Opens the pictures of requests. Safe in several threads."""

    def __init__(self, model: Model, access: Access, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self._remote = RemotePictures(access.image_hosts, limits)

    def open(self, picture: PictureRef, max_patches: int | None) -> Patches:
        """The patches of a picture; `max_patches` is for one that has none of its own.

        Raises ApiError, which names its place in the request.
        """
        own = picture.max_patches is not None
        max_patches = picture.max_patches if own else max_patches
        try:
            budget = self._model.budget
            if picture.detail == "low":
                max_patches = min(budget.min_patches, max_patches or budget.max_patches)
            image = open_image(self._bytes(picture.url), max_pixels=self._limits.pixels)
            return self._model.preprocess(image, max_patches)
        except ImageError as error:
            said = str(error).replace("<bytes>", picture.where)
            raise api_error(ImageError(said), picture.where) from None
        except InputError as error:
            raise api_error(error, f"{picture.where}.max_patches" if own else "max_patches") from None

    def _bytes(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return _of_data_url(url)
        if url[:7].lower() == "http://" or url[:8].lower() == "https://":
            return self._remote.fetch(url)
        raise ImageError(
            "a picture is given as a data URL, data:image/png;base64,...; no file or other scheme is opened"
        )


def _of_data_url(url: str) -> bytes:
    head = _DATA_URL.match(url[:1000])
    if head is None:
        raise ImageError("the data URL must begin like data:image/png;base64,")
    try:
        data = base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is not valid base64: {error}") from None
    if not data:
        raise ImageError("the data URL is empty: it holds no picture")
    return data
