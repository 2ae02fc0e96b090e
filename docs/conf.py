"Sphinx's settings; docs/build.py stages the sources and calls it."

project = "fairmix_nb"
author = copyright = "The fairmix_nb developers"  # noqa: A001
html_title = "fairmix_nb"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
myst_update_mathjax = False
mathjax_path = "mathjax/tex-chtml.js"  # beside the pages: no network is needed to read a formula
mathjax3_config = {"chtml": {"mtextInheritFont": True}, "options": {"enableMenu": False}}
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "native"
exclude_patterns = ["_build"]
