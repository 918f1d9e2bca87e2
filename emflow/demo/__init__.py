"""The demonstration: a simulated microscope whose lens is wrong, and everything that corrects it is the real thing."""
