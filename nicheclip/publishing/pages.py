"""HTML pages that need nothing but themselves; base.html.jinja has what they share."""

import base64
from collections.abc import Callable
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from nicheclip.images import encode_jpeg

SHORT_SIDE, LONG_SIDE = 112, 160  # pixels, of a thumbnail at most
JPEG_QUALITY = 80


def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder and base.html.jinja, escaping what they are given."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": "{:,}".format, "percent": percent}
    templates.filters["plural"] = lambda n, noun: f"{n:,} {noun}" + ("s" if n != 1 else "")
    return templates


def percent(share: float, digits: int = 0) -> str:
    """A share in words: 0.125 is "12%"; 100% is what is whole, not what is rounded to it."""
    text = f"{share:.{digits}%}"
    return "over 99%" if text.startswith("100") and share < 1 else text


class Thumbnails:
    """The small pictures of a page: each is kept once, at its end, however often it is shown."""

    def __init__(self, picture: Callable[[str], Image.Image]):
        """`picture` gives the image of a source_id; it raises KeyError if there is none."""
        self._picture = picture
        self.ids: dict[str, str] = {}  # the id of each <image> by its URI

    def __call__(self, source_id: str) -> Markup | None:
        """The <svg> that shows a picture; None if there is no picture."""
        try:
            image = self._picture(source_id)
        except KeyError:
            return None
        scale = min(1, SHORT_SIDE / min(image.size), LONG_SIDE / max(image.size))
        width, height = (max(1, round(side * scale)) for side in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        encoded = base64.b64encode(encode_jpeg(small, JPEG_QUALITY)).decode()
        uri = f"data:image/jpeg;base64,{encoded}"
        image_id = self.ids.setdefault(uri, f"p{len(self.ids)}")
        return Markup(
            '<svg class="picture" viewBox="0 0 {} {}" role="img" aria-label="picture of {}">'
            '<use href="#{}"/></svg>'
        ).format(width, height, source_id, image_id)
