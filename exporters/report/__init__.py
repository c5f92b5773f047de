"""The report: one offline HTML file about a run, or about several side by side.

`reading` asks the store what is healthy and what is not, and what there is to see; `page` makes a file of both. What
passes between them are the frozen objects of `model`.
"""
