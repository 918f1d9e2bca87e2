"""A microscope of arithmetic: hidden aberrations, drift and dose noise, writing real files."""
