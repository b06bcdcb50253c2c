"""What both rooms know of torch calls: nodes and data, paths, layouts, the table of rules."""
