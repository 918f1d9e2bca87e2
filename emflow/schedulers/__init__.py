"""Where jobs run: one file per scheduler."""
