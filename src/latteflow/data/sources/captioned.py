"""A captioned set held in memory, such as ``latteflow data emoji`` writes, as a source."""

from __future__ import annotations

from latteflow.data.captioned import CaptionedImages
from latteflow.data.prompts import canonical_caption
from latteflow.data.sources.source import Sample


class Captioned:
    """Pictures of a set with their canonical captions."""

    def __init__(self, images: CaptionedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return number, code points, style and skin tone."""
        record = self.images.records[index]
        return f"{index}:{record.concept}:{record.style}:{record.skin_tone}"

    def read(self, index: int) -> Sample:
        """Return a picture and the caption that describes it best."""
        [picture] = self.images.pictures([index])
        return Sample(picture, canonical_caption(self.images.records[index]))
