"use strict";
const byId = (id) => document.getElementById(id);

// Text from a model enters the page only as text, never as HTML.
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function tokenText(text) {
  return text.split(/([·↵⇥∅]+)/).filter(Boolean).map((part, i) =>
    /^[·↵⇥∅]/.test(part) ? element("i", "", part) : part);
}

function words(side, list) {
  const cell = element("td", side);
  const top = Math.max(...list.map(([, score]) => Math.abs(score))) || 1;
  for (const [text, score] of list) {
    const hit = element("span", "hit", element("span", "word", ...tokenText(text)));
    if (score !== undefined) { // there are pages that have no room for scores
      hit.append(element("span", "score", score));
      hit.title = "score " + score;
    }
    hit.style.setProperty("--s", score === undefined ? 0.5 : Math.max(score, 0) / top);
    cell.append(hit);
  }
  return cell;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed() {
  const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  const theme = {
    "font.color": colour("--ink"), "font.family": getComputedStyle(document.body).fontFamily, "font.size": 13,
    "hoverlabel.bgcolor": colour("--card"), "hoverlabel.bordercolor": colour("--line"), "hoverlabel.font.color": colour("--ink"),
    "legend.bgcolor": "rgba(0,0,0,0)",
    "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": colour("--soft"), "modebar.activecolor": colour("--ink"),
  };
  for (const [key, value] of Object.entries(axis)) theme["xaxis." + key] = theme["yaxis." + key] = value;
  return theme;
}

// A finger scrolls the page; only a mouse drags a zoom box.
function draw(figures, plots = Object.keys(figures), adjust = () => {}, themedToo = () => {}) {
  const coarse = matchMedia("(pointer: coarse)").matches;
  for (const plot of plots) {
    const { data: traces, layout } = figures[plot];
    if (coarse) layout.dragmode = false;
    adjust(plot, layout);
    Plotly.newPlot(plot, traces, layout, {
      displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  }
  const retheme = () => {
    const theme = themed();
    for (const plot of plots) Plotly.relayout(plot, theme);
    themedToo();
  };
  retheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
}
