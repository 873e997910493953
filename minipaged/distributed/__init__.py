"""Chapter 13. More than one device: every rank holds its share of the heads, and one block table is valid for all."""
