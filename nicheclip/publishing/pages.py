"""HTML pages that need nothing but themselves: their pictures are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from PIL import Image

SHORT_SIDE, LONG_SIDE = 112, 160  # pixels, of a thumbnail at most
JPEG_QUALITY = 80


def environment(folder: Path) -> jinja2.Environment:
    """Templates of a folder, escaping what they are given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class Thumbnail:
    """One small picture of the page: `uri` holds its JPEG, `number` is its place."""

    number: int
    uri: str
    width: int
    height: int


@dataclass
class Thumbnails:
    """The pictures that the page asks for, each of them once."""

    picture: Callable[[str], Image.Image]
    made: dict[str, Thumbnail | None] = field(default_factory=dict)  # by source_id
    distinct: dict[str, Thumbnail] = field(default_factory=dict)  # by uri

    def __call__(self, source_id: str) -> Thumbnail | None:
        """None if there is no picture."""
        if source_id not in self.made:
            try:
                image = self.picture(source_id)
            except KeyError:
                self.made[source_id] = None
            else:
                self.made[source_id] = self._add(image)
        return self.made[source_id]

    def _add(self, image: Image.Image) -> Thumbnail:
        scale = min(1, SHORT_SIDE / min(image.size), LONG_SIDE / max(image.size))
        size = [max(1, round(side * scale)) for side in image.size]
        encoded = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(
            encoded, "JPEG", quality=JPEG_QUALITY
        )
        uri = f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        return self.distinct.setdefault(uri, Thumbnail(len(self.distinct), uri, *size))
