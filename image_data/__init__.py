"""Image data: files to pixels, the drawn data set SHAPES, and data sets that timm reads."""
