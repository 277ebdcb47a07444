"""Codecs of a teacher's distribution, one file each."""
