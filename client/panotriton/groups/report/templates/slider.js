// What img-comparison-slider leaves out: its value for screen readers, and a look at 1:1.
function announceSlider(slider) {
  slider.setAttribute("role", "slider");
  slider.setAttribute("aria-valuemin", "0");
  slider.setAttribute("aria-valuemax", "100");
  const announce = () => {
    slider.setAttribute("aria-valuenow", String(Math.round(slider.value)));
    slider.setAttribute("aria-valuetext", `${Math.round(slider.value)} % bicubic`);
  };
  slider.addEventListener("slide", announce);
  announce();
}

function enableZoom(button) {
  const viewport = button.closest(".compare").querySelector(".viewport");
  button.addEventListener("click", () => {
    const zoomed = viewport.classList.toggle("zoomed");
    button.setAttribute("aria-pressed", String(zoomed));
    viewport.scrollLeft = (viewport.scrollWidth - viewport.clientWidth) / 2;
    viewport.scrollTop = (viewport.scrollHeight - viewport.clientHeight) / 2;
  });
}

document.querySelectorAll("img-comparison-slider").forEach(announceSlider);
document.querySelectorAll(".zoom").forEach(enableZoom);
