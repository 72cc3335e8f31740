// Draws the figures embedded in the page, in the colours of the theme in use, and again when that changes.
(function () {
  "use strict";
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var root = document.documentElement;
  var dark = window.matchMedia("(prefers-color-scheme: dark)");

  // "@front" in a specification is the custom property --front of the style sheet.
  function coloured(value, style) {
    if (typeof value === "string") {
      return value[0] === "@" && /^@[a-z]+$/.test(value) ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map(function (item) { return coloured(item, style); });
    if (value && typeof value === "object") {
      var copy = {};
      Object.keys(value).forEach(function (key) { copy[key] = coloured(value[key], style); });
      return copy;
    }
    return value;
  }

  function show(id) {
    var target = id && document.getElementById("p-" + id);
    if (!target) return;
    var details = target.querySelector("details");
    if (details) details.open = true;
    target.scrollIntoView({ behavior: "smooth", block: "center" });
    target.classList.add("flash");
    setTimeout(function () { target.classList.remove("flash"); }, 1600);
  }

  function draw() {
    var style = getComputedStyle(root);
    var narrow = window.innerWidth < 640;
    Object.keys(figures).forEach(function (id) {
      var element = document.getElementById(id);
      if (!element) return;
      var figure = coloured(figures[id], style);
      figure.layout.font.family = style.getPropertyValue("--sans").trim();
      figure.layout.autosize = true;
      if (narrow) {
        figure.layout.margin.l = 40;
        figure.layout.margin.r = 8;
        figure.layout.font.size = 12;
        // Above a narrow plot a legend would wrap into it.
        Object.assign(figure.layout.legend, { y: -0.22, yanchor: "top" });
      }
      // Buttons are named one by one: plotly's own set has one that uploads the chart.
      var buttons = [["zoomIn2d", "zoomOut2d", "resetScale2d"], ["zoom2d", "pan2d"], ["toImage"]];
      var config = { responsive: true, displaylogo: false, modeBarButtons: buttons, showSendToCloud: false };
      // The buttons are for a pointer and for figures with room beside them.
      if (narrow || element.clientHeight < 400) config.displayModeBar = false;
      Plotly.react(element, figure.data, figure.layout, config).then(function () {
        if (element.dataset.drawn) return;
        element.dataset.drawn = "yes";
        element.on("plotly_click", function (event) { show(event.points[0].customdata); });
        // Out of the frame that was opened with: everything there is.
        element.on("plotly_doubleclick", function () {
          var opened = figures[id].layout.yaxis.range;
          if (!opened) return;
          var all = element.dataset.all !== "yes";
          element.dataset.all = all ? "yes" : "";
          Plotly.relayout(element, all ? { "yaxis.autorange": true, "xaxis.autorange": true } : { "yaxis.range": opened.slice(), "xaxis.autorange": true });
        });
      });
    });
  }

  document.getElementById("theme").addEventListener("click", function () {
    var now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    if (window.Plotly) draw();
  });
  // The slider: the fastest point on each target within the loss that is allowed.
  var offers = JSON.parse((document.getElementById("offers") || { textContent: '{"points": []}' }).textContent);
  var most = offers.points.reduce(function (found, point) { return Math.max(found, point.loss); }, 0);
  if (most > 0) {
    var slider = document.getElementById("loss");
    // To two digits; rounded down, the largest loss would never be allowed.
    var upwards = function (number) {
      var unit = Math.pow(10, Math.floor(Math.log10(number)) - 1);
      return number && Number((Math.ceil(number / unit - 1e-9) * unit).toPrecision(2));
    };
    var ask = function () {
      var allowed = upwards(most * Math.pow(slider.value / 100, 2));  // finer where losses are small; what is said is what is allowed
      document.getElementById("allowed").textContent = (allowed + " " + offers.unit).trim();
      var within = offers.points.filter(function (point) { return point.loss <= allowed + 1e-12; });
      var got = document.getElementById("got");
      got.textContent = "";
      var names = Object.keys(offers.points[0].seconds);
      names.forEach(function (name) {
        var best = within.reduce(function (found, point) {
          return point.seconds[name] < (found ? found.seconds[name] : Infinity) ? point : found;
        }, null);
        var line = document.createElement("span");
        if (best === null || best.id === "") {
          line.textContent = "nothing faster than dense";
        } else {
          var link = document.createElement("a");
          link.href = "#p-" + best.id;
          link.textContent = best.id;
          link.addEventListener("click", function () { show(best.id); });
          line.append(best.faster[name] + " (" + best.time[name] + "), " + best.value + ", " + best.change + ", " + best.size + ": ", link);
        }
        if (names.length > 1) line.prepend(name + ": ");
        got.append(line, document.createElement("br"));
      });
    };
    slider.addEventListener("input", ask);
    document.getElementById("allow").hidden = false;
    ask();
  }

  // The drawing library lies deflated in the page.
  function unpacked(text) {
    var bytes = Uint8Array.from(atob(text), function (character) { return character.charCodeAt(0); });
    var stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).text();
  }

  unpacked(document.getElementById("plotly").textContent.trim()).then(function (code) {
    var script = document.createElement("script");
    script.textContent = code;
    document.head.appendChild(script);
    dark.addEventListener("change", draw);
    draw();
  });
})();
