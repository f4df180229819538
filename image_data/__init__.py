"""Image data: files to pixels, the generated data set SHAPES, and data sets that timm reads."""
