"""The captioned emoji set: six styles of about 1,900 emoji, 64x64, with names, tags, groups and skin tones."""

from __future__ import annotations

from latteflow.data.emoji.build import BuildReport, build_emoji

__all__ = ["BuildReport", "build_emoji"]
