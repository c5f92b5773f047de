"""A live view of one run in a terminal: what `lmt watch` shows.

`recent` reads the last captures of a run at a cost that does not grow with the run, `questions` and `reading` ask what
there is to know, `health` says what is well and what is not, `plot` and `frame` draw it as text, and `screen` keeps it
on a terminal.
"""
