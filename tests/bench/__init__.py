"""What Leasehold costs and how fast it is, beside its peers in the same run: `make bench`.

::

    __main__     the command: which sections, where to
    plan         how much of everything a full and a quick run do
    control      sections 1 to 3: rounds of commits, handovers, transfers, each with its peers
    takeover     section 4: from the death of a controller to the next
    datapath     section 5: the NBD server beside others
    idle         section 6: what held devices cost
    figures      what a section found, and its targets
    number       how figures are summed up and shown
    machine      what all of it was measured on
    chart        bars as SVG
    report       tables, JSON, and the generated part of docs/benchmarks.md

Machines differ and are noisy. So whatever is compared is measured in the same run, by turns, in rounds; a
figure is the median over the rounds, and a ratio is one of such medians. A peer that is not installed leaves
a gap that the report names.
"""
