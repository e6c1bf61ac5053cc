"""Rigs: how the infrared camera of a pair lies in the visible one's frame, found once, kept in a file, then applied."""
