"""Side-by-side measurements of speed: cases that take turns in one process, and the limits they are held against."""
