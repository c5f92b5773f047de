"""The report: one offline HTML file about a run, or about several side by side.

`findings` asks the store what is healthy and what is not, `figures` what there is to see, `page` makes both a file. What
passes between them are the frozen objects of `model`.
"""
